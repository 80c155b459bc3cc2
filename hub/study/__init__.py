"""The paper's question on a small network: every activation in it, with the same recipe, data order and seeds."""
