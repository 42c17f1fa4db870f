"""Compiler options for small networks, whose time is XLA's."""

FAST_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
