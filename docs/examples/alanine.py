"""Alanine dipeptide with forces, simulated by OpenMM in vacuum with the Amber 14 force field.

    python docs/examples/alanine.py [--frames 2000] [--kelvin 800]

Positions are in Å, with their centre of mass removed; scores are forces divided by kT, in 1/Å.
"""

import argparse
import sys

import numpy as np
import openmm
import torch
from openmm import app, unit
from torch import Tensor
from tqdm import trange

GAS = 0.00831446  # kJ/mol/K
SKETCH = """
ACE CH3 0.0 0.0 0.0
ACE C   1.3 0.8 0.0
ACE O   1.3 2.0 0.0
ALA N   2.5 0.1 0.0
ALA CA  3.8 0.8 0.0
ALA CB  3.9 1.6 1.2
ALA C   5.0 0.0 0.0
ALA O   5.0 -1.2 0.0
NME N   6.3 0.7 0.0
NME C   7.5 -0.1 0.0
"""


class Alanine:
    """The molecule at a given temperature: its energy, forces, simulation and torsions."""

    def __init__(self, kelvin: float = 800.0, seed: int = 0) -> None:
        forcefield = app.ForceField("amber14-all.xml")
        rows = [line.split() for line in SKETCH.strip().splitlines()]
        topology = app.Topology()
        chain = topology.addChain()
        residues = {name: topology.addResidue(name, chain) for name in ("ACE", "ALA", "NME")}
        for name, atom, *_ in rows:
            topology.addAtom(atom, app.Element.getBySymbol(atom[0]), residues[name])
        topology.createStandardBonds()
        start = [openmm.Vec3(*map(float, row[2:])) / 10 for row in rows]
        modeller = app.Modeller(topology, start * unit.nanometer)
        modeller.addHydrogens(forcefield)
        self.atoms = [f"{a.residue.name} {a.name}" for a in modeller.topology.atoms()]
        self.kT = GAS * kelvin
        # With rigid bonds, the positions would have no density.
        system = forcefield.createSystem(modeller.topology, constraints=None)
        integrator = openmm.LangevinMiddleIntegrator(kelvin, 1.0, 0.0005)  # K, 1/ps, ps
        integrator.setRandomNumberSeed(seed + 1)
        platform = openmm.Platform.getPlatformByName("Reference")
        self.context = openmm.Context(system, integrator, platform)
        self.context.setPositions(modeller.positions)
        openmm.LocalEnergyMinimizer.minimize(self.context)
        self.context.setVelocitiesToTemperature(kelvin, seed + 1)

    def simulate(self, frames: int, apart: int = 600) -> tuple[Tensor, Tensor]:
        """Return positions and scores (frames, 22, 3), `apart` steps of 0.5 fs between frames."""
        self.context.getIntegrator().step(20_000)
        found = []
        for _ in trange(frames, desc="frames", file=sys.stderr, leave=False):
            self.context.getIntegrator().step(apart)
            found.append(self._state()[:2])
        x, scores = (torch.as_tensor(np.stack(part)) for part in zip(*found, strict=True))
        return x - x.mean(1, keepdim=True), scores

    def log_target(self, x: Tensor) -> Tensor:
        """Return −E/kT for positions (N, 22, 3) in Å."""
        values = []
        for positions in x.double().cpu().numpy() / 10:
            self.context.setPositions(positions)
            values.append(-self._state()[2] / self.kT)
        return torch.tensor(values, dtype=torch.float64)

    def _state(self) -> tuple[np.ndarray, np.ndarray, float]:
        state = self.context.getState(positions=True, forces=True, energy=True)
        x = state.getPositions(asNumpy=True)._value
        forces = state.getForces(asNumpy=True)._value
        return 10 * x, forces / (10 * self.kT), state.getPotentialEnergy()._value

    def torsion(self, x: Tensor, names: str) -> Tensor:
        """Return the angle (N,) around the bond between the second and third atoms, in radians."""
        rows = [self.atoms.index(name) for name in names.split(", ")]
        a, b, c = x[:, rows].diff(dim=1).unbind(1)
        b_hat = b / b.norm(dim=1, keepdim=True)
        first, second = torch.linalg.cross(a, b), torch.linalg.cross(b, c)
        side = (torch.linalg.cross(first, second) * b_hat).sum(1)
        return torch.atan2(side, (first * second).sum(1))

    def left_handed(self, x: Tensor) -> Tensor:
        """Return positions (N, 22, 3), mirrored where the amino acid has the wrong handedness."""
        names = ("ALA N", "ALA C", "ALA CB", "ALA CA")
        *three, centre = (x[:, self.atoms.index(name)] for name in names)
        a, b, c = (part - centre for part in three)
        volume = (torch.linalg.cross(a, b) * c).sum(1)
        return torch.where((volume > 0)[:, None, None], x, -x)


def main() -> None:
    """Simulate, and print the share of frames on either side of φ = 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--kelvin", type=float, default=800.0)
    options = parser.parse_args()
    molecule = Alanine(options.kelvin)
    x, _ = molecule.simulate(options.frames)
    phi = molecule.torsion(x, "ACE C, ALA N, ALA CA, ALA C")
    print(f"{float((phi > 0).double().mean()):.1%} of {options.frames} frames have φ > 0")


if __name__ == "__main__":
    main()
