"""Decoders of one's own, as small as they can be: copy one into your package and change it."""
