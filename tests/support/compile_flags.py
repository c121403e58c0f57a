"""How the tests' programs are compiled."""

# They compile for seconds and run for milliseconds: without the CPU compiler's slow passes they take half the time. The
# TPU compiler does not read these flags.
QUICK_COMPILES = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
