"""Chips, topologies, placements and the time of collectives: hardware as values."""

from gspmd.meshes.chips import CHIPS as CHIPS
from gspmd.meshes.chips import Chip as Chip
from gspmd.meshes.chips import Power as Power
from gspmd.meshes.chips import chip as chip
from gspmd.meshes.network import Time as Time
from gspmd.meshes.network import Traffic as Traffic
from gspmd.meshes.network import seconds as seconds
from gspmd.meshes.placement import Part as Part
from gspmd.meshes.placement import Placement as Placement
from gspmd.meshes.search import make_mesh as make_mesh
from gspmd.meshes.topology import Level as Level
from gspmd.meshes.topology import Topology as Topology
from gspmd.meshes.topology import smallest as smallest
from gspmd.meshes.topology import topology as topology
