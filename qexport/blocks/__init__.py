"""Methods that work on one decoder layer as a whole, after its linears are coded; one file each."""
