"""A call over many ranks without the ranks: its tasks and transfers are those of the real plan, their times a model's.

plan.py      which tasks each rank has, in which order, and which tiles travel
costs.py     seconds of a task: from StarPU's own models, measured here, or of a rate that is given
network.py   when each tile arrives
schedule.py  workers that take tasks as they become ready
backward.py  tasks, transfers and times of the gradients

`flashtile.scaling` is the door.
"""
