"""From records to numbers with intervals, tables and plots."""
