"""The untrusted side: holds the weights, runs programs of linear steps, keeps no session."""
