//! Threads whose keys are others.

use crate::cases::Keys;
use cfi_stack::Stack;
use cfi_stack::thread::Thread;
use std::sync::mpsc::{Sender, channel};

type Job = Box<dyn FnOnce(&Thread) + Send>;

/// A thread that had some of its keys made anew, attached. It never ends: it could not return through what its old keys signed.
pub struct Foreign {
    jobs: Sender<Job>,
}

impl Foreign {
    /// Starts it.
    pub fn new(keys: Keys) -> Result<Foreign, String> {
        let (jobs, queue) = channel::<Job>();
        let (attached, answer) = channel();
        std::thread::Builder::new()
            .spawn(move || {
                keys.apply();
                let thread = Thread::attach();
                let _ = attached.send(thread.as_ref().err().cloned());
                while let (Ok(thread), Ok(job)) = (&thread, queue.recv()) {
                    job(thread);
                }
                loop {
                    std::thread::park();
                }
            })
            .map_err(|error| error.to_string())?;
        match answer.recv() {
            Ok(None) => Ok(Foreign { jobs }),
            other => Err(format!("no other thread: {other:?}")),
        }
    }

    /// Has it do something, and waits for that.
    ///
    /// # Panics
    /// When the thread is gone.
    pub fn ask<T: Send>(&self, job: impl FnOnce(&Thread) -> T + Send) -> T {
        let (sender, receiver) = channel();
        let job: Box<dyn FnOnce(&Thread) + Send + '_> = Box::new(move |thread| {
            let _ = sender.send(job(thread));
        });
        // SAFETY: what it borrows outlives it: it has been called and dropped, or its sender has, before this returns.
        let job: Job = unsafe { std::mem::transmute(job) };
        self.jobs.send(job).expect("the thread never ends");
        receiver.recv().expect("the thread has done it")
    }

    /// The same with a stack.
    pub fn with<T: Send>(&self, stack: &mut Stack, job: impl FnOnce(&Thread, &mut Stack) -> T + Send) -> T {
        self.ask(move |thread| job(thread, stack))
    }
}
