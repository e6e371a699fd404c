"""Low-rank factors of projections: linear algebra, metrics, and which heads share a latent."""
