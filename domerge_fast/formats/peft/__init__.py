"""PEFT folders and live PEFT models, read and written."""
