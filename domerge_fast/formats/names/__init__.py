"""What the modules of image and video models are called: one spelling for files of all styles."""
