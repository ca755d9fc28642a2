"""evaluate: model + held-out rows → metrics, report, decision."""
