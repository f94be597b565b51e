"""What an ablation is made of: arms, figures by seed, tables and a chart. It knows no model and no run."""
