"""How the tests' programs are compiled: they compile for seconds and run for milliseconds.

Without the CPU compiler's slow optimisations the tests take about half the time. The TPU compiler does not read these.
"""

QUICK = "--xla_backend_optimization_level=0"  # in the tests' own process, where numbers are compared
QUICK_COMPILES = f"{QUICK} --xla_llvm_disable_expensive_passes=true"  # in the runs that they start
