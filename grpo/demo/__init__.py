"""What `python train.py --demo` needs: synthetic hearts as mp4 files, a small model and a tokenizer."""
