"""What a run keeps: files, checkpoints and its folder, on a disk or in a bucket, under one contract."""
