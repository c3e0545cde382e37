/* What the trampoline (shim.c) asks of the launcher (launch.c). */
#include "launch.h"

/* Where a task's data lies: address, bytes between the rows (0: adjacent) and between the heads (0: one, or as the kernel
   has it) of each handle, sizes that its launches need, and the worker's scratch memory. */
typedef struct {
	int64_t address[FT_HANDLES], row_bytes[FT_HANDLES], plane_bytes[FT_HANDLES], sizes[FT_SIZES], scratch;
} ft_place;

/* Puts a task's launches into the stream and returns. 0, a status of the driver, or one of launch.h's with the reason in
   detail[FT_DETAIL]. */
int ft_launch(const ft_kernels *kernels, const ft_place *place, const int64_t *values, void *stream, char *detail);
