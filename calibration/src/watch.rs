//! The CPU as a backend with someone who looks on.
//!
//! Lives here: [`Watched`], a [`Backend`] that hands each run of a session to a [`Watch`], which runs it and
//! notes what it wants to know. The pipeline runs it as any other backend. Never here: what is noted.

use latile_cpu::session::{CpuBackend, CpuSession};
use latile_runtime::backend::{
    Backend, DeviceInfo, Norms, Offer, PortSpec, PrepareError, Room, RunError, Session,
    SessionStats,
};
use latile_runtime::format::{Model, Role};
use std::cell::RefCell;
use std::rc::Rc;

/// Which network a session runs, and on what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The network.
    pub(crate) role: Role,
    /// Rows and columns that the session was prepared for.
    pub(crate) size: [usize; 2],
}

/// Someone who looks on.
pub(crate) trait Watch: 'static {
    /// Runs `session`, of the network that `place` names, and notes what it wants to know.
    ///
    /// # Errors
    /// The session's own, or one that stops the run.
    fn run(
        &mut self,
        session: &mut CpuSession<'_>,
        place: Place,
        inputs: &[&[f32]],
        outputs: &mut [&mut [f32]],
    ) -> Result<(), RunError>;
}

/// The CPU as a backend whose sessions are run by a [`Watch`].
pub(crate) struct Watched<'a, W> {
    pub(crate) cpu: &'a CpuBackend,
    pub(crate) watch: Rc<RefCell<W>>,
}

impl<W: Watch> Backend for Watched<'_, W> {
    fn info(&self) -> DeviceInfo {
        self.cpu.info()
    }

    fn offers(
        &self,
        model: &Model,
        role: Role,
        height: usize,
        width: usize,
    ) -> Result<Vec<Offer>, PrepareError> {
        self.cpu.offers(model, role, height, width)
    }

    fn prepare<'m>(
        &self,
        model: &'m Model,
        role: Role,
        height: usize,
        width: usize,
        room: Room,
    ) -> Result<Box<dyn Session + 'm>, PrepareError> {
        let inner = self.cpu.session_in(model, role, height, width, room)?;
        let place = Place { role, size: [height, width] };
        Ok(Box::new(WatchedSession { inner, place, watch: Rc::clone(&self.watch) }))
    }
}

struct WatchedSession<'m, W> {
    inner: CpuSession<'m>,
    place: Place,
    watch: Rc<RefCell<W>>,
}

impl<W: Watch> Session for WatchedSession<'_, W> {
    fn inputs(&self) -> &[PortSpec] {
        self.inner.inputs()
    }

    fn outputs(&self) -> &[PortSpec] {
        self.inner.outputs()
    }

    fn run(&mut self, inputs: &[&[f32]], outputs: &mut [&mut [f32]]) -> Result<(), RunError> {
        self.watch.borrow_mut().run(&mut self.inner, self.place, inputs, outputs)
    }

    fn set_timestep_group(&mut self, group: usize) {
        self.inner.set_timestep_group(group);
    }

    fn use_norms(&mut self, norms: Norms) {
        self.inner.use_norms(norms);
    }

    fn stats(&self) -> SessionStats {
        self.inner.stats()
    }
}

/// Runs a session on vectors made for its outputs, and gives them; `run` is told the session.
///
/// # Errors
/// Those of `run`.
pub(crate) fn outputs<S: Session + ?Sized>(
    session: &mut S,
    run: impl FnOnce(&mut S, &mut [&mut [f32]]) -> Result<(), RunError>,
) -> Result<Vec<Vec<f32>>, RunError> {
    let mut outputs: Vec<Vec<f32>> = session
        .outputs()
        .iter()
        // Invariant: `prepare` refused shapes whose elements cannot be counted.
        .map(|port| vec![0.0; port.shape.elements().unwrap_or(0)])
        .collect();
    let mut slices: Vec<&mut [f32]> = outputs.iter_mut().map(Vec::as_mut_slice).collect();
    run(session, &mut slices)?;
    Ok(outputs)
}
