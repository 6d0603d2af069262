"""A small Yi-VL that sees coloured shapes and printed words: its data, training and evaluation."""
