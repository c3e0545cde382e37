"""What the score language and the CPU kernels both stand on: LLVM IR as text, the machines it is written for, and the
way from text to callable code.

    ir.py        typed values over LLVM IR text      math.py    exp2, log2, tanh as polynomials
    machines/    one instruction set a file          jit.py     text to object code to a callable
    cache.py     object code on disk
"""
