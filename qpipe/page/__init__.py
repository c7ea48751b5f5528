"""Pages one looks at: self-contained HTML from what runs, sweeps and comparisons left behind."""
