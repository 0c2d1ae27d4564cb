"""Talks to other ranks: means of gradients, weights that one rank updated for all, and a word before each of them."""
