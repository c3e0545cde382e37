"""What the score language and the CPU kernels both stand on: LLVM IR as text, the machines it is written for, and the
way from text to callable code.

    types.py, values.py, ir.py    types, values and functions over LLVM IR text     math.py    exp2, log2, tanh
    routines.py        emitted functions with typed parameters      machines/    one instruction set a file
    blocks.py          parameter blocks, areas of scratch memory    products/    one micro-kernel a file, as data
    lines.py           rows in memory, lines of registers           jit.py, cache.py    text to objects, kept on disk
"""
