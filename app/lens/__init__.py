"""The lens: what every layer of a model would have said at each token that it generated (LayerSkip, Fig. 2)."""
