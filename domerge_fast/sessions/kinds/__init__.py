"""What is prepared of a merge, by kind: all that does not depend on coefficients, and what these
make of it.

    gains    ΔW = λ L diag(g(κ)) R             linear, cat, slerp, multislerp, tsvm, pico
    rotated  ΔW = λ L C(κ) R                   what is R x R: iso_c, svd, wudi, lego, core, knots
    scaled   ΔW = λ L diag(g(κ)) R diag(h(κ))  do
    tiles    the whole merge once more         ties and others that form the updates entry by entry

κ [modules, T] has one coefficient for each adapter and module, L [m, k] and R [k, n] stay.
"""
