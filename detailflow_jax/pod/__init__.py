"""What a TPU pod would do with a program, found out on a CPU with the TPU's own compiler.

topologies.py   the slices: chips, memory, peak, bandwidths, and devices to compile for
meshes.py       the mesh of a slice
programs.py     the real train step or sampler with abstract, sharded arguments; compiling it
hlo.py          the compiled program's text: instructions, and how often each runs
flops.py        floating-point operations of the compiled program
cycles.py       cycles of its core, by the compiler's estimate
traffic.py      bytes to and from a chip's memory
collectives.py  bytes between the chips, and over which links
report.py       the least time a step can take, and what it costs; all as text and as JSON
advice.py       what to change in a program that does not fit
command.py      `detailflow compile-pod`
"""
