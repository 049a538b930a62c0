"""A toy arithmetic task and a tiny warm-started Qwen3, to see CPPO learn in minutes on two CPU cores."""
