"""Weight sharing: clustering, choice of bits, fine-tuning of centroids."""
