"""The network, its loss and its optimizer."""
