"""The page that ``recalkv report`` writes about a checkpoint."""
