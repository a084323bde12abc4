"""Looking at a run before, during and after it.

plan_report   what a run would see, from the indexes      preview    the first packs as the model sees them (HTML)
validate      every sample read and checked               bench      how fast the data side is
replay        every sample of one step                    report     the run as one HTML page (charts, stage_charts)
"""
