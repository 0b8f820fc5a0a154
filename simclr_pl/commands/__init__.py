"""The commands on trained encoders: what `simclr linear | knn | finetune | distill | embed` call."""
