"""Plots and tables from run folders, several runs beside each other."""
