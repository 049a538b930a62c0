"""Everything that touches verl, Ray and vLLM. ``compat`` asserts the versions and signatures the rest relies on."""
