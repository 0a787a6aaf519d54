"""Groups of similar teacher layers: similarity in one streaming pass, hierarchical clustering, a picture."""
