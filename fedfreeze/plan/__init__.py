"""`fedfreeze plan`: what is known before anything is trained."""
