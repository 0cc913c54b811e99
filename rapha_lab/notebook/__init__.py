"""The display: cell magic, cards, server extension."""
