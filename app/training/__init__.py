"""The LightningModule, its optimizer steps, and the strategy that spreads it over devices."""
