"""`moekit bench`: contestants that do the same work, alternating in one run, each checked against a reference.

    shapes, seed ─► layer | decode | step | model ─► contestants ─► compare ─► cases ─► result (JSON)
                                                        ▲              ▲
                                              peers: transformers,   limits: matrix products,
                                              llama.cpp, dense       memory bandwidth

Read `compare`, then `checks`, then one subject. A contestant that computes something else than the reference is
refused.
"""
