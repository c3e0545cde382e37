"""Attention over several ranks by StarPU-MPI: every rank computes its own query tiles, and key tiles travel.

build.py     the binding, compiled against the installed StarPU-MPI and MPI
parts.py     which rank has which tiles
cpus.py      where the threads of ranks on one machine run
link.py      StarPU-MPI's state in this process, and transfers
order.py     in which order tiles meet in a backward
heads.py     an exchange of heads among ranks, before
bias.py      a bias that is cut by query rows
collective.py    one call on all ranks: described, compared, planned, run; errors of one rank reach all

The door is flashtile.starpu_mpi; kernels, flow and tasks are those of the engine `starpu`.
"""
