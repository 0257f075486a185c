"""The monitor's widgets: panels, dialogs, and the line of views."""
