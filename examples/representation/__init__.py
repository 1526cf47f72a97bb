"""What convolution on tokens can express, an experiment a file; `python -m representation`."""
