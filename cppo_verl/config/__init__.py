"""The settings of a run: composed by Hydra from configs/, and checked before Ray starts."""
