"""The input (paper section 4): from image files to batches on the device."""
