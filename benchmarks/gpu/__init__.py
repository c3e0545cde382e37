"""`python -m benchmarks.gpu`: for whoever has a GPU, the one command: is it right there, and how fast is it.

steps.py      steps in processes of their own, within one budget of time; a step that fails stops no other
checks.py     every option in every dtype, held against the reference, shared over processes
habits.py     what only a device shows: streams, waiting, graphs, threads, far addresses, other libraries, lent memory
timing.py     device time and call time beside torch's backends, flash-attn and FlexAttention (peers.py)
precompile.py what is timed, compiled in processes beside the checks
host.py       what a call costs on the host, with a driver that does nothing: needs no GPU
"""
