"""Everything that touches verl, Ray and vLLM. ``compat`` asserts the versions and signatures the rest relies on."""

import gc

# A process here imports some hundred thousand objects that stay; by default Python looks through all of them again and
# again for ones to free, a tenth of the time that the imports take.
gc.set_threshold(50_000, 50, 50)
