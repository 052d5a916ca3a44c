"""How results are shown: on the terminal (rich) and as JSON. Nothing here measures anything."""
