//! The flow of a picture: frame → tile → latent → schedule → denoise → decode → blend, a module each.
