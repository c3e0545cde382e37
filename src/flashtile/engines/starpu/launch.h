/* What Python sees of the launcher: machine code of GPU kernels, and where a launch finds its arguments. Read by cffi,
   beside shim.h. Knows neither StarPU nor NVIDIA's headers. */

#define FT_ARGUMENTS 64
#define FT_BLOCK 128
#define FT_SIZES 12
#define FT_LAUNCHES 16
#define FT_HANDLES 16
#define FT_DETAIL 160

/* Status of a launch that failed before the driver said anything, which counts from 1. */
#define FT_NO_DRIVER -1
#define FT_NO_STREAM -2
#define FT_ROWS_APART -3
#define FT_MISALIGNED -4

/* One argument that differs between tasks, written into the block of parameters: `size` bytes at `offset`.
   FT_ADDRESS  of handle `index`, and sizes[other] bytes more unless other is -1
   FT_ROW      elements of `unit` bytes between the rows of handle `index`; as the block has it where they are adjacent
   FT_PLANE    elements of `unit` bytes between a head of handle `index` and the `other`th after it; as FT_ROW
   FT_APART    elements of `unit` bytes from handle `other` to handle `index`
   FT_SIZE     sizes[index]
   FT_TILES    tiles of `unit` that sizes[index] takes
   FT_SCRATCH  address of the worker's scratch memory, and `index` bytes more
   FT_PROGRAMS programs of the launch's grid
   The machine code relies on the value being a multiple of `multiple`. */
#define FT_ADDRESS 0
#define FT_ROW 1
#define FT_APART 2
#define FT_SIZE 3
#define FT_TILES 4
#define FT_SCRATCH 5
#define FT_PLANE 6
#define FT_PROGRAMS 7

/* Of sizes: rows of the task's tiles; its heads, if it says nothing else. */
#define FT_ROWS 0
#define FT_HEADS 5

typedef struct {
	int32_t offset, size, source, index, other, unit, multiple;
} ft_argument;

/* A kernel: machine code (an image for cuModuleLoadData) with the function in it, known by `id` as long as the process
   lives; threads, programs of a cluster and dynamic shared memory in bytes of a program; the block of parameters with
   every argument that does not differ. The grid is the product over all n of the tiles of grid_unit[n] that
   sizes[grid_size[n]] takes, or grid_unit[n] itself where grid_size[n] is -1. */
typedef struct {
	uint64_t id;
	uintptr_t image;
	char function[64];
	int32_t threads, cluster, shared;
	int32_t grid_size[3], grid_unit[3];
	int32_t bytes, arguments;
	ft_argument argument[FT_ARGUMENTS];
	int64_t block[FT_BLOCK];
} ft_kernel;

/* The launches of a task, in order, of one of four cases: 1 if values[which[0]] is not 0, and 2 more if values[which[1]]
   is not; -1 stands for a value of 0.
   dense[n]: what the kernels take for the bytes between the rows of handle n, if they cannot be told; else 0. packed[n]:
   the same of its heads, for each row of the tile. */
typedef struct {
	int32_t which[2], launches[4];
	int64_t dense[FT_HANDLES], packed[FT_HANDLES];
	const ft_kernel *kernel[4][FT_LAUNCHES];
} ft_kernels;

/* Opens NVIDIA's driver, once; 0, or -1 with the reason in `why`. */
int ft_driver_open(const char *path, char *why, int size);
/* Forgets what was loaded into contexts that have ended. */
void ft_driver_forget(void);
