"""Double precision everywhere; float32 is asked for by dtype where it is meant."""

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)
