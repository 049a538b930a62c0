"""The versions this release is written for, where several modules must agree on them."""

VERL_VERSION = "0.9.1"
