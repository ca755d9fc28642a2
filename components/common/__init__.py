"""What two or more stages need; no stage's own work lives here."""
