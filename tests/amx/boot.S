/* The program that a bootable image starts with: one call of a kernel, on the memory of the process that wrote it.

A multiboot loader puts the image at 1 MB and enters it in 32 bits. It turns on paging by the tables of the image, in
which the process' pages lie where the process has them, 64-bit mode, and the registers up to tiles; calls the kernel;
and writes to the emulator's port 0xE9 a word of greeting, what the kernel returned, the number and the contents of each
page that was written, and -1. There are no interrupts. At a fault it writes another greeting, the address that was
asked for, and the top of the stack: an error's number, where there is one, and the instruction. image.py defines the
names in capitals. */

#define AT(label) (0x100000 + (label - start))
#define PORT 0xE9
#define POWER_OFF 0x8900

.code32
.globl start
start:
  .long 0x1BADB002, 0x00010000, -(0x1BADB002 + 0x00010000)      /* multiboot, with addresses */
  .long 0x100000, 0x100000, END, END, AT(entry)
entry:
  cli
  mov $STACK, %esp
  mov %cr4, %eax
  or $((1 << 5) | (1 << 9) | (1 << 10) | (1 << 18)), %eax       /* PAE, SSE, its exceptions, XSAVE */
  mov %eax, %cr4
  mov $TABLES, %eax
  mov %eax, %cr3
  mov $0xC0000080, %ecx                                         /* EFER: long mode */
  rdmsr
  or $0x100, %eax
  wrmsr
  mov %cr0, %eax
  and $0xFFFFFFF3, %eax
  or $0x80000003, %eax                                          /* paging; a float unit */
  mov %eax, %cr0
  lgdt AT(descriptors)
  ljmp $8, $AT(long)
.align 8
segments: .quad 0, 0x00AF9A000000FFFF, 0x00CF92000000FFFF
descriptors:
  .word 23
  .long AT(segments)

.code64
long:
  mov $16, %eax
  mov %eax, %ds
  mov %eax, %es
  mov %eax, %ss
  fninit
  xor %ecx, %ecx
  xor %edx, %edx
  mov $0x600E7, %eax                                            /* x87, SSE, AVX, AVX-512, tiles */
  xsetbv
  mov $STACK, %rsp
  movl $0x1F80, -8(%rsp)
  ldmxcsr -8(%rsp)
  xor %ecx, %ecx                                                /* each of 32 exceptions goes to `fault` */
  mov $AT(fault), %eax
  mov $GATES, %edi
0:
  movl %eax, 4(%rdi)                                            /* the upper half of its address, */
  movw $0x8E00, 4(%rdi)                                         /* an interrupt's gate, */
  movw $8, 2(%rdi)                                              /* this segment, */
  movw %ax, (%rdi)                                              /* the lower half */
  movq $0, 8(%rdi)
  add $16, %edi
  inc %ecx
  cmp $32, %ecx
  jb 0b
  lidt AT(gates)
  movabs $ARGUMENT_0, %rdi
  movabs $ARGUMENT_1, %rsi
  movabs $ARGUMENT_2, %rdx
  movabs $ARGUMENT_3, %rcx
  movabs $KERNEL, %rax
  call *%rax
  cld
  mov $PORT, %edx
  mov %rax, word(%rip)
  lea greeting(%rip), %rsi
  mov $16, %ecx
  rep outsb
  xor %ebx, %ebx
1:
  cmp $PAGES, %rbx
  jae 3f
  mov ENTRIES(, %rbx, 8), %rax                                  /* where the page's entry of a table lies */
  testb $0x40, (%rax)
  jz 2f
  mov %rbx, word(%rip)
  lea word(%rip), %rsi
  mov $8, %ecx
  rep outsb
  mov (%rax), %rsi
  and $0xFFFFFFFFFFFFF000, %rsi
  mov $4096, %ecx
  rep outsb
2:
  inc %rbx
  jmp 1b
3:
  movq $-1, word(%rip)
  lea word(%rip), %rsi
  mov $8, %ecx
  rep outsb
off:
  mov $POWER_OFF, %edx
  lea goodbye(%rip), %rsi
  mov $8, %ecx
  rep outsb
4:
  hlt
  jmp 4b
fault:
  cld
  mov %cr2, %rax
  mov %rax, word(%rip)
  mov $PORT, %edx
  lea regret(%rip), %rsi
  mov $8, %ecx
  rep outsb
  lea word(%rip), %rsi
  mov $8, %ecx
  rep outsb
  mov %rsp, %rsi
  mov $16, %ecx
  rep outsb
  jmp off
gates:
  .word 511
  .quad GATES
regret: .ascii "FAULTED_"
greeting: .ascii "RETURNED"
word: .quad 0
goodbye: .ascii "Shutdown"
